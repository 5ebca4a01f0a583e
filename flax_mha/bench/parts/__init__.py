"""Where a layer's time goes: its products and passes, each timed alone, beside the whole."""
