import torch

# Tests run side by side with others on small machines, and one thread makes sums repeatable.
torch.set_num_threads(1)
