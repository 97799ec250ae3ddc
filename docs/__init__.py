"""The documentation: pages in Markdown, and the code that builds the site."""
