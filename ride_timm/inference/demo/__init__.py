"""The demo of a model: what it computes, its markup, its page."""
