"""TODO alignment"""
