"""TODO zoo"""
