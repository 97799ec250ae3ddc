"""TODO problems"""
