"""The networks, each a timm model or an open_clip text tower."""
