"""Test accuracy of local objectives beside backprop."""
