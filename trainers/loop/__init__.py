"""Training one network, or several as one batched program, with or without the persistent penalty."""
