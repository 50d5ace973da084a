"""Search passages by meaning: encode them once, then compare each query with all of them.

Run it with: python examples/semantic_search.py "How do I get my money back?"
"""

import sys

from unmask import Encoder

PASSAGES = [
    "You can return any item within 30 days for a full refund.",
    "Parcels are delivered within three working days.",
    "To reset your password, open Settings and choose Security.",
    "Our offices are closed on public holidays.",
    "We accept credit cards, bank transfer and PayPal.",
]

query = sys.argv[1] if len(sys.argv) > 1 else "How do I get my money back?"

encoder = Encoder.load("unmask/smollm2-embed-6l")
passages = encoder.encode_document(PASSAGES)  # [passages, dimensions]; store these in your database
scores = encoder.similarity(encoder.encode_query([query]), passages)[0]

print(query)
for place in scores.argsort()[::-1][:3]:
    print(f"{scores[place]:.2f}  {PASSAGES[place]}")
