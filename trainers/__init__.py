"""The trainer: plain and persistent training into run directories."""
