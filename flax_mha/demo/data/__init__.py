"""What the tasks learn from: text, digits, dates."""
