"""Models in a browser: what each says of a picture, on a page of tabs served to this machine alone.

inputs (what visitors give, checked) -> answers (one pure function for each tab) -> page (their HTML, and Gradio's
layout) -> server (HTTP, and what it refuses).
"""
