// Read an ONNX folder by transformers.js.
//
//     node transformers_js_reader.mjs PACKAGES FOLDER DTYPE OUTPUT
//
// PACKAGES is a folder with node_modules in it, DTYPE is fp32 or q8. OUTPUT is "pipeline", which averages the tokens, or
// "sentence_embedding", the graph's own vector, which models with layers behind the pooling need. The first line on standard output is a JSON object
// with the version. Each line on standard input, {"texts": [...], "batch": n}, is answered by {"vectors": [...]}.

import { createRequire } from "node:module";
import { basename, dirname } from "node:path";
import { createInterface } from "node:readline";

const [packages, folder, dtype, output] = process.argv.slice(2);
const { env, pipeline } = createRequire(`${packages}/`)("@huggingface/transformers");
env.allowRemoteModels = false;
env.localModelPath = `${dirname(folder)}/`;

const extract = await pipeline("feature-extraction", basename(folder), {
  dtype,
  device: "cpu",
  session_options: { intraOpNumThreads: 1 },
});
console.log(JSON.stringify({ version: env.version }));

for await (const line of createInterface({ input: process.stdin })) {
  const { texts, batch } = JSON.parse(line);
  const vectors = [];
  for (let start = 0; start < texts.length; start += batch) {
    const part = texts.slice(start, start + batch);
    const rows =
      output === "pipeline"
        ? await extract(part, { pooling: "mean", normalize: true })
        : (await extract.model(extract.tokenizer(part, { padding: true, truncation: true }))).sentence_embedding;
    vectors.push(...rows.tolist());
  }
  console.log(JSON.stringify({ vectors }));
}
