"""What `verify` is made of: does the capture do what the model does?"""
