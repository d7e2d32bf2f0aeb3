"""What ``bench/gpu.py`` is made of: steps in a time budget, carried out by processes of their own."""
