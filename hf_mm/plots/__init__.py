"""What a model learned, to look at: tensors to matplotlib figures, and figures to one HTML page."""
