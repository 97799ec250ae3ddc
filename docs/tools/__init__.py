"""What pages need beyond Sphinx: blocks that run, figures, references made from the code, equations as MathML."""
