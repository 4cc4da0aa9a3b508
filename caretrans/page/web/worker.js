// One program in one runtime. The page starts a worker for each, because only ending it frees all its memory.
// Messages: {id, action, options}; replies: {id, result}, {id, error} or {id, progress}.
import { CACHE } from './offline.js';
import { decode, normalise, prepare } from './prepare.js';
import { prepareRuntime, reach } from './runtimes.js';

const WARM_UP = { least: 10, most: 50, window: 5, change: 0.05 }; // runs, until medians of two windows agree
const CLOCK_STEPS = 20; // a timed block of runs lasts at least as many steps of the clock
const MOST_IN_BLOCK = { wasm: Infinity, webgpu: 4 }; // few, as page.js limits the runs on WebGPU

let clock; // smallest step of the clock, ms
let run; // from an image as numbers to its logits on the CPU, for which waiting belongs to the time of a run
let program; // of the manifest
let provider; // of the backend
let image; // the first test image, as numbers
let tests; // decoded test images

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** The smallest step of the clock, ms, of some that are seen. */
function measureClock() {
  let least = Infinity;
  for (let i = 0; i < 20; i++) {
    const start = performance.now();
    let now = start;
    while (now === start) now = performance.now();
    least = Math.min(least, now - start);
  }
  return least;
}

async function hash(bytes) {
  if (!crypto.subtle) return null; // not a secure context
  const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, '0')).join('');
}

/** The bytes of a file, whose counts are reported while they stream; its hash is checked where the browser can. */
async function download({ file, bytes, sha256 }, report) {
  const response = await reach(file, fetch(file));
  if (!response.ok) throw new Error(`${file}: the server answers ${response.status} ${response.statusText}`);
  const content = new Uint8Array(bytes);
  let count = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reach(file, reader.read());
    if (done) break;
    if (count + value.length <= bytes) content.set(value, count);
    count += value.length;
    report(value.length);
  }
  const found = await hash(content);
  if (count !== bytes || (found !== null && found !== sha256)) {
    if (self.caches) await (await caches.open(CACHE)).delete(file);
    throw new Error(`${file} is damaged: it is not the file that was built. Copy the folder again and reload.`);
  }
  return content;
}

/** Load the runtime and the program. */
async function load({ manifest, wanted, backend }, report) {
  [program, provider] = [wanted, backend.provider];
  const { folder, files } = manifest.runtimes[backend.runtime];
  const start = performance.now();
  const { wasm, compile } = await prepareRuntime(folder, program, backend);
  const sources = [{ ...files[wasm], file: folder + wasm }, program.files[backend.runtime]];
  let [count, total] = [0, sources[0].bytes + sources[1].bytes];
  const add = (bytes) => { count += bytes; report({ count, total }); };
  const [binary, content] = [await download(sources[0], add), await download(sources[1], add)];
  const downloaded = performance.now();
  run = await compile(content, binary);
  const ready = performance.now();
  tests = [];
  for (const name of manifest.images) tests.push(await decode(await (await reach(name, fetch(name))).blob()));
  image = toNumbers(prepare(tests[0], program.preparation));
  clock = measureClock();
  return {
    download_ms: downloaded - start, load_ms: toTime(ready - downloaded), isHashed: Boolean(crypto.subtle), clock,
  };
}

/** A difference of two times; a coarse clock may not have moved in between. */
function toTime(difference) {
  return Math.max(difference, clock);
}

function toNumbers(pixels) {
  return normalise(pixels, program.preparation);
}

/** Compare both test images with PyTorch in float64. */
async function check() {
  let error = 0;
  let samePixels = true;
  for (const [i, { logits, pixels: digest }] of program.checks.entries()) {
    const pixels = prepare(tests[i], program.preparation);
    const found = await hash(pixels.data);
    samePixels &&= found === null || found === digest;
    const outputs = await run(toNumbers(pixels));
    const largest = Math.max(...logits.map(Math.abs));
    for (const [k, expected] of logits.entries()) {
      const difference = Math.abs(outputs[k] - expected) / largest;
      error = difference <= error ? error : difference; // NaN stays
      if (Number.isNaN(difference)) return { error: NaN, samePixels, isRight: false };
    }
  }
  return { error, samePixels, isRight: error <= program.tolerance };
}

/** Milliseconds of a run, the mean of as many. */
async function timeBlock(count) {
  const start = performance.now();
  for (let i = 0; i < count; i++) await run(image);
  return (performance.now() - start) / count;
}

/** Double a block of runs until the clock can time it; also the runs this took, and the milliseconds of one of them. */
async function findBlock() {
  for (let [block, runs] = [1, 0]; ; block *= 2) {
    const typical = await timeBlock(block);
    runs += block;
    if (block * typical >= CLOCK_STEPS * clock || block >= MOST_IN_BLOCK[provider]) return { block, runs, typical };
  }
}

/** Run until times are stable. The first run, apart, compiles shaders or fills caches. */
async function warmUp() {
  const times = [await timeBlock(1)];
  const { least, most, window, change } = WARM_UP;
  let isStable = false;
  while (times.length < most && !isStable) {
    times.push(await timeBlock(1));
    const [before, after] = [median(times.slice(-2 * window, -window)), median(times.slice(-window))];
    isStable = times.length >= least && Math.abs(after - before) <= Math.max(change * before, clock);
  }
  const { block, runs, typical } = await findBlock();
  return { first_ms: toTime(times[0]), warm_up: times.length + runs, typical, isStable, block };
}

/** Milliseconds of `count` runs, each the mean of a block where the clock is too coarse for one. */
async function time({ count, block }) {
  const times = [];
  for (let i = 0; i < count; i++) times.push(await timeBlock(block));
  return times;
}

/** Logits of an image file, and the milliseconds of preparing and running it. */
async function classify({ blob }) {
  const start = performance.now();
  const pixels = prepare(await decode(blob), program.preparation);
  const prepared = performance.now();
  const logits = await run(toNumbers(pixels));
  return {
    logits, pixels, prepare_ms: prepared - start, run_ms: performance.now() - prepared, digest: await hash(pixels.data),
  };
}

const actions = { load, check, warmUp, time, classify };

export async function answer({ id, action, options }) {
  try {
    const result = await actions[action](options, (progress) => self.postMessage({ id, progress }));
    self.postMessage({ id, result });
  } catch (error) {
    self.postMessage({ id, error: error.message || String(error) });
  }
}
