"""TODO loop"""
