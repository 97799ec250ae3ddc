"""Extensions to Sphinx: code blocks that run, figures, references generated from the code, equations as MathML."""
