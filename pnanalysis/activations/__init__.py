"""What activations do: hooks on a network, statistics that stream over examples, and a monitor for training loops."""
