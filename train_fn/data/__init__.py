"""From rows of text and images to padded tensors."""
