"""Generation: prefill, the compiled decoding loop, speculative decoding, and the sampler that drives them."""
