"""Generation with a key/value cache: greedy or sampled, in batches or as a stream."""

from trainjax.rollout.decoding import Completion, generate, prompt_ids, stream
from trainjax.rollout.sampling import Sampler, greedy, sampler

__all__ = ["Completion", "Sampler", "generate", "greedy", "prompt_ids", "sampler", "stream"]
