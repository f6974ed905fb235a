"""The pages that a run and a comparison are written as: templates, their styles and scripts, and rendering them."""
