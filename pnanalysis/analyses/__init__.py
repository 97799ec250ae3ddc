"""One module per public analysis: runs, files or networks in; an ``xarray.Dataset`` out."""
