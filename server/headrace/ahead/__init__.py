"""Kernels compiled before anybody launches them: beside a cold start, or for an image.

Imports nothing heavy: a start asks here whether there is anything to do.
"""
