"""Meeting points with other packages: their weights, and their functions over our attention."""
