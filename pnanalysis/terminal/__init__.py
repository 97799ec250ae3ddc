"""What a person sees at a terminal: tables, messages and progress."""
