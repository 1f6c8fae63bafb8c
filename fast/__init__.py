"""Faster drop-ins for functions of the files beside this folder, tested equal to them."""
