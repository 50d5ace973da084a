"""Group texts by topic with k-means of scikit-learn.

Run it with: python examples/clustering.py
"""

from sklearn.cluster import KMeans

from unmask import Encoder

TEXTS = [
    "The striker scored twice in the final.",
    "The goalkeeper saved a penalty.",
    "The team won the championship.",
    "Simmer the sauce for ten minutes.",
    "Bake the bread until it is golden.",
    "Season the soup with salt and pepper.",
    "The telescope found a distant galaxy.",
    "The probe landed on Mars.",
    "Astronomers observed a new comet.",
]

encoder = Encoder.load("unmask/smollm2-embed-6l")
vectors = encoder.encode(TEXTS, normalize=True)  # with length 1, k-means groups by cosine
labels = KMeans(n_clusters=3, n_init="auto", random_state=0).fit_predict(vectors)

for cluster in range(3):
    print(f"cluster {cluster}")
    for text, label in zip(TEXTS, labels, strict=True):
        if label == cluster:
            print("  ", text)
