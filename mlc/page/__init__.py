"""The page: a program or plan as one HTML file to explore, with nothing to install and nothing to load."""

from mlc.page.content import Measured, content
from mlc.page.document import html

__all__ = ["Measured", "content", "html"]
