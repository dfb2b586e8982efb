"""Continue several prompts in one batch, printing each line when its text is complete.

python examples/generate.py [checkpoint folder or preset]
"""

import sys

import deepfuse as df

PROMPTS = ["It is a truth", "The condition of our foreign affairs", "She had been so long in the country that"]

model = df.build(sys.argv[1] if len(sys.argv) > 1 else "v3-tiny", max_batch_size=2)

# pieces come as they are generated, of all running prompts by turns; the third waits for a free place
texts = list(PROMPTS)
for index, piece in model.generate(PROMPTS, max_new_tokens=24, temperature=0.7, top_p=0.9, seed=7, stream=True):
    texts[index] += piece
for text in texts:
    print(text)

# the same seed gives the same draws
assert model.generate(PROMPTS[0], max_new_tokens=8, seed=1) == model.generate(PROMPTS[0], max_new_tokens=8, seed=1)

for prompt, log_probabilities in zip(PROMPTS, model.score(PROMPTS), strict=True):
    print(f"{-log_probabilities.mean():.2f} nats a token: {prompt}")
print(model.report)
