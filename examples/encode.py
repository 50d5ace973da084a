"""Encode texts into vectors and compare them.

Run it with: python examples/encode.py
"""

from unmask import Encoder

encoder = Encoder.load("unmask/smollm2-embed-6l")

texts = ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rise."]
vectors = encoder.encode(texts)
print("vectors:", vectors.shape, vectors.dtype)

print("cosine of each pair:")
print(encoder.similarity(vectors, vectors).round(2))

# The numbers of a vector are in the order of what they carry, so the first 256 are a good vector, too.
short = encoder.encode(texts, dimensions=256, normalize=True)
print("truncated:", short.shape)

# A text has the same vector alone and in any batch.
alone = encoder.encode(texts[0])
print("same vector alone and in a batch:", bool((alone[0] == vectors[0]).all()))
