"""The page: a program or plan as one HTML file to explore, with nothing to install and nothing to load."""

from mlc.view.page.content import Measured, content
from mlc.view.page.document import html

__all__ = ["Measured", "content", "html"]
