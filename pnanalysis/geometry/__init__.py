"""TODO geometry"""
