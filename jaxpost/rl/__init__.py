"""What turns scores of sampled completions into what the losses read: rewards, advantages, KL coefficients. Pure."""
