"""A whole step of a decoder as one call, where every operation it is made of is native.

Its reference twin: the composed decoder (`models/decoder.py`), on the same packed weights.
"""
