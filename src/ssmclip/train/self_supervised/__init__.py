"""Objectives that add losses between views of an image to CLIP's: SLIP's and A-CLIP's."""
