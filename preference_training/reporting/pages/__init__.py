"""The templates of pages, and what fills them."""
