"""Start the server and call it with the official OpenAI client.

Run it with: python examples/serve_and_call.py
"""

import subprocess
import sys
import time
import urllib.error
import urllib.request

from openai import OpenAI

PORT = 8093
URL = f"http://127.0.0.1:{PORT}"


def wait_until_ready(server: subprocess.Popen[bytes]) -> None:
    """Wait until /ready answers 200: then every loaded model gives the right vector for its canary text."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{URL}/ready", timeout=5)
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise SystemExit("the server ended before it was ready; its message is above")


server = subprocess.Popen([sys.executable, "-m", "unmask", "serve", "--port", str(PORT), "--log-level", "warning"])
try:
    wait_until_ready(server)
    client = OpenAI(base_url=f"{URL}/v1", api_key="unused")
    answer = client.embeddings.create(model="unmask/smollm2-embed-6l", input=["a text", "another"])
    print(len(answer.data), "vectors of", len(answer.data[0].embedding), "dimensions")
finally:
    server.terminate()
    server.wait()
