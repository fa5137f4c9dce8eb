// Classifies a picture with an exported model, in the browser. The model is model.onnx beside this file, written by
// `visual-perceiver export`. Image size, normalisation and labels are JSON in that file's metadata.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";

const MAX_PIXELS = 2 ** 25; // of a picture, as on the Python side
const SHOWN = 5; // labels
const $ = (id) => document.getElementById(id);

// The JSON in an ONNX file's metadata. onnxruntime-web does not expose it, so this walks the file's outermost protobuf fields:
// ModelProto.metadata_props is field 14, pairs of a key (1) and a value (2).
export function onnxMetadata(bytes, wanted) {
  function* fields(start, end) {
    let at = start;
    const varint = () => {
      let value = 0;
      for (let scale = 1; at < end; scale *= 128) {
        const byte = bytes[at++];
        value += (byte & 127) * scale;
        if (byte < 128) return value;
      }
      throw new Error("Expected model.onnx to be an ONNX file; it is truncated.");
    };
    while (at < end) {
      const tag = varint();
      const field = Math.floor(tag / 8);
      const kind = tag % 8;
      if (kind === 0) varint();
      else if (kind === 1) at += 8;
      else if (kind === 5) at += 4;
      else if (kind === 2) {
        const length = varint();
        yield [field, at, at + length];
        at += length;
      } else throw new Error("Expected model.onnx to be an ONNX file, got another format.");
    }
  }
  const text = new TextDecoder();
  for (const [field, start, end] of fields(0, bytes.length)) {
    if (field !== 14) continue;
    const pair = {};
    for (const [part, from, to] of fields(start, end)) pair[part] = text.decode(bytes.subarray(from, to));
    if (pair[1] === wanted) return JSON.parse(pair[2]);
  }
  throw new Error("Expected model.onnx to be written by `visual-perceiver export`; the metadata entry is missing.");
}

// The kernels of the Python side's resampling (Pillow), with their half widths.
const KERNELS = {
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, (x) => {
    const a = -0.5;
    x = Math.abs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
  }],
};

// The pixels under each output pixel, and their weights: wider than the kernel when shrinking, so that nothing is skipped.
function contributions(from, to, kernel) {
  const [width, weigh] = KERNELS[kernel];
  const step = from / to;
  const stretch = Math.max(1, step);
  return Array.from({ length: to }, (_, i) => {
    const center = (i + 0.5) * step;
    const first = Math.max(0, Math.floor(center - width * stretch + 0.5));
    const last = Math.min(from, Math.floor(center + width * stretch + 0.5));
    const weights = [];
    for (let j = first; j < last; j++) weights.push(weigh((j + 0.5 - center) / stretch));
    const sum = weights.reduce((a, b) => a + b, 0);
    return [first, weights.map((w) => w / sum)];
  });
}

// RGBA bytes of one size to RGB bytes of another, rows first, as Pillow does it.
export function resize({ data, width, height }, newWidth, newHeight, kernel) {
  const rows = new Uint8ClampedArray(height * newWidth * 3);
  const across = contributions(width, newWidth, kernel);
  for (let y = 0; y < height; y++) {
    across.forEach(([first, weights], x) => {
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        for (let j = 0; j < weights.length; j++) sum += weights[j] * data[(y * width + first + j) * 4 + c];
        rows[(y * newWidth + x) * 3 + c] = sum; // rounds and clamps
      }
    });
  }
  const result = new Uint8ClampedArray(newHeight * newWidth * 3);
  contributions(height, newHeight, kernel).forEach(([first, weights], y) => {
    for (let i = 0; i < newWidth * 3; i++) {
      let sum = 0;
      for (let j = 0; j < weights.length; j++) sum += weights[j] * rows[(first + j) * newWidth * 3 + i];
      result[y * newWidth * 3 + i] = sum;
    }
  });
  return result;
}

// RGB bytes, (H, W, 3), to normalised floats, (3, H, W).
export function normalise(rgb, mean, std) {
  const size = rgb.length / 3;
  return Float32Array.from({ length: rgb.length }, (_, i) => {
    const channel = Math.floor(i / size);
    return (rgb[(i % size) * 3 + channel] / 255 - mean[channel]) / std[channel];
  });
}

function softmax(logits) {
  const highest = Math.max(...logits);
  const powers = Array.from(logits, (x) => Math.exp(x - highest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((x) => x / sum);
}

function say(text, error = false) {
  $("message").textContent = text;
  $("message").classList.toggle("error", error);
}

let session, facts, input; // input: the picture as the model takes it
let running = false, again = false;

async function load() {
  ort.env.wasm.wasmPaths = new URL("node_modules/onnxruntime-web/dist/", import.meta.url).href;
  ort.env.wasm.numThreads = 1; // more need headers that a plain file server does not send
  const response = await fetch("model.onnx", { cache: "no-cache" });
  if (!response.ok) throw new Error(`Cannot load model.onnx (${response.status}); \`visual-perceiver export\` writes it.`);
  const bytes = new Uint8Array(await response.arrayBuffer());
  facts = onnxMetadata(bytes, "visual_perceiver");
  if (facts.num_channels !== 3) throw new Error(`Expected a model of 3 channels, got ${facts.num_channels}.`);
  if (!KERNELS[facts.interpolation]) {
    throw new Error(`Expected interpolation among ${Object.keys(KERNELS).join(", ")}, got ${facts.interpolation}.`);
  }
  session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  const fixed = facts.num_active_queries;
  $("k").max = facts.num_queries;
  $("k").value = fixed ?? facts.default_num_active_queries;
  $("k").disabled = fixed !== null;
  $("t").value = facts.default_dqs_threshold;
  $("queries").replaceChildren(...Array.from({ length: facts.num_queries }, () => document.createElement("i")));
  showKnobs();
  document.querySelector("main").hidden = false;
  say("Ready.");
  openChosen(); // what was chosen while the model was loading
}

function showKnobs() {
  $("kValue").value = `${$("k").value} of ${facts.num_queries}`;
  $("tValue").value = Number($("t").value) >= 1 ? "1 (all kept)" : $("t").value;
}

async function open(file) {
  let picture;
  try {
    picture = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    say(`Cannot read ${file.name} as a picture.`, true);
    return;
  }
  if (picture.width * picture.height > MAX_PIXELS) {
    const limit = MAX_PIXELS.toLocaleString("en");
    say(`Expected an image of at most ${limit} pixels, got ${picture.width}x${picture.height}.`, true);
    return;
  }
  const canvas = new OffscreenCanvas(picture.width, picture.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  const [height, width] = facts.image_size;
  const rgb = resize(context.getImageData(0, 0, picture.width, picture.height), width, height, facts.interpolation);
  input = normalise(rgb, facts.mean, facts.std);

  const small = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) small.data[i * 4 + c] = rgb[i * 3 + c];
    small.data[i * 4 + 3] = 255;
  }
  Object.assign($("small"), { width, height }).getContext("2d").putImageData(small, 0, 0);
  URL.revokeObjectURL($("picture").src);
  Object.assign($("picture"), { src: URL.createObjectURL(file), alt: file.name, hidden: false });
  document.querySelector("#drop span").hidden = true;
  $("seen").hidden = false;
  await classify();
}

// One run at a time. If an input changes during a run, the model runs once more afterwards.
async function classify() {
  showKnobs();
  if (!input) return;
  again = running;
  if (running) return;
  running = true;
  try {
    const [height, width] = facts.image_size;
    const feeds = {
      pixel_values: new ort.Tensor("float32", input, [1, 3, height, width]),
      dqs_threshold: new ort.Tensor("float32", [Number($("t").value)], []),
    };
    if (facts.num_active_queries === null) {
      feeds.num_active_queries = new ort.Tensor("int64", [BigInt($("k").value)], []);
    }
    const began = performance.now();
    const { logits, active_queries: active } = await session.run(feeds);
    show(softmax(logits.data), active.data, performance.now() - began);
  } catch (error) {
    say(`Cannot run the model: ${error.message}`, true);
  } finally {
    running = false;
  }
  if (again) await classify();
}

function show(probabilities, active, milliseconds) {
  const used = active.reduce((sum, a) => sum + a, 0);
  $("cost").textContent = `${used} of ${facts.num_queries} queries used, ${milliseconds.toFixed(1)} ms`;
  $("cost").dataset.used = used;
  [...$("queries").children].forEach((dot, i) => dot.classList.toggle("active", Boolean(active[i])));
  const best = probabilities.map((p, i) => [p, facts.labels[i]]).sort((a, b) => b[0] - a[0]).slice(0, SHOWN);
  $("labels").replaceChildren(...best.map(([p, label]) => {
    const item = document.createElement("li");
    const name = Object.assign(document.createElement("span"), { textContent: label });
    const bar = Object.assign(document.createElement("meter"), { value: p });
    const number = Object.assign(document.createElement("output"), { textContent: `${(100 * p).toFixed(1)} %` });
    item.dataset.probability = p;
    item.append(name, bar, number);
    return item;
  }));
  say("Ready.");
}

$("k").addEventListener("input", classify);
$("t").addEventListener("input", classify);
function openChosen() {
  if (session && $("file").files.length) open($("file").files[0]);
}

$("file").addEventListener("change", openChosen);
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // the browser would leave the page for the picture
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length && session) open(event.dataTransfer.files[0]);
  });
}

load().catch((error) => say(error.message, true));
