// The page: checks a network on opening, classifies photos, and measures networks in rounds.
import { describeError, explainWrong, open } from './job.js';
import { describeBrowser, listBackends } from './device.js';
import { describeRow, drawPlot, formatMs, makeCSV, makeJSON, summarise } from './results.js';

const RULES = { rounds: 10, runs: 5, seconds: 0.5, pause: 500 }; // of a measurement; per round, ms between rounds
const PATIENCE = 2000; // ms for the service worker to take the page over
const LOST = 'the page was hidden or left during the measurement, so its times are void: measure again';
const find = (id) => document.getElementById(id);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
const getBytes = (program) => program.files.onnxruntime.bytes;
const sizeRuntime = (runtime, file) => megabytes(manifest.runtimes[runtime].files[file].bytes);
const query = new URLSearchParams(location.search);

let manifest;
let backends;
let classifier; // {program, job} of the last photo
let classifying = Promise.resolve(); // until the last photo is done
let rows = []; // of the last measurement
let stopped = ''; // why a measurement ends early
const facts = {};

/** Name programs for people: the model, and what sets it apart from others of the same model. */
function nameProgram(program) {
  const isTwin = (other) => other !== program && other.model === program.model;
  const twins = manifest.programs.filter(isTwin);
  const parts = [program.model];
  if (program.precision !== 'fp32') parts.push(program.precision);
  if (twins.some(({ size }) => size[0] !== program.size[0])) parts.push(`${program.size[0]} px`);
  if (twins.some(({ weights }) => weights !== program.weights)) parts.push(program.weights || 'random weights');
  return parts.join(', ');
}

function setState(element, text, kind = '') {
  element.textContent = text;
  element.classList.toggle('good', kind === 'good');
  element.classList.toggle('bad', kind === 'bad');
}

// 1. Check ------------------------------------------------------------------------------------------------------------

async function checkFirst() {
  const single = manifest.programs.filter(({ precision }) => precision === 'fp32');
  const [program] = (single.length ? single : [...manifest.programs]).sort((a, b) => getBytes(a) - getBytes(b));
  const bar = find('check-progress');
  const state = find('check');
  setState(state, `Loading the smallest network, ${program.model}, ${megabytes(getBytes(program))}, ` +
    `and the runtime, ${sizeRuntime('onnxruntime', 'ort-wasm-simd-threaded.wasm')}…`);
  const start = performance.now();
  try {
    const { job, loaded, check } = await open(manifest, program, backends[0], (share) => { bar.value = share; });
    facts['Step of the clock'] = `${Number(loaded.clock.toPrecision(2))} ms`;
    showFacts();
    const seconds = ((performance.now() - start) / 1000).toFixed(1);
    if (!check.isRight || !check.samePixels) {
      setState(state, explainWrong(program, check), 'bad');
    } else {
      const hashed = loaded.isHashed ? ', from the file that was built' : '';
      setState(state, `Yes: ${program.label} computes what PyTorch computes (error ${describeError(check)}), on the ` +
        `same pixels${hashed}. First result after ${seconds} s.`, 'good');
    }
    job.end();
  } catch (error) {
    setState(state, error.message, 'bad');
  }
  bar.hidden = true;
}

// 2. Classify ---------------------------------------------------------------------------------------------------------

function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = Array.from(logits, (value) => Math.exp(value - largest));
  const sum = powers.reduce((total, value) => total + value, 0);
  return powers.map((value) => value / sum);
}

function showPixels({ width, height, data }) {
  const canvas = find('seen');
  Object.assign(canvas, { width, height });
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) image.data.set([data[3 * i], data[3 * i + 1], data[3 * i + 2], 255], 4 * i);
  canvas.getContext('2d').putImageData(image, 0, 0);
}

function showClasses(logits, names) {
  const shares = softmax(logits);
  const best = [...shares.keys()].sort((a, b) => shares[b] - shares[a]).slice(0, 5);
  find('classes').replaceChildren(...best.map((label) => {
    const item = document.createElement('li');
    const bar = document.createElement('meter');
    bar.value = shares[label];
    bar.setAttribute('aria-hidden', 'true');
    const name = document.createElement('span');
    const share = document.createElement('span');
    name.textContent = names[label];
    share.textContent = `${(100 * shares[label]).toFixed(1)} %`;
    item.append(name, share, bar);
    return item;
  }));
}

async function openClassifier(program) {
  if (classifier?.program === program) return classifier.job;
  classifier?.job.end();
  classifier = undefined;
  const state = find('classify-state');
  const { job, check } = await open(manifest, program, backends[0], (share) => {
    setState(state, `Loading ${program.model}: ${Math.round(100 * share)} % of ${megabytes(getBytes(program))}`);
  });
  if (!check.isRight || !check.samePixels) {
    job.end();
    throw new Error(explainWrong(program, check));
  }
  classifier = { program, job };
  return job;
}

/** Classify one photo, or the promise of one, after the other. */
function classify(blob) {
  classifying = classifying.then(() => classifyNow(blob));
  return classifying;
}

async function classifyNow(blob) {
  const state = find('classify-state');
  const program = manifest.programs[find('classify-model').value];
  try {
    const job = await openClassifier(program);
    setState(state, 'Classifying…');
    const result = await job.call('classify', { blob: await blob });
    showPixels(result.pixels);
    showClasses(result.logits, manifest.class_lists[program.classes]);
    find('prediction').hidden = false;
    find('prediction').dataset.digest = result.digest ?? '';
    setState(state, `Prepared in ${formatMs(result.prepare_ms)} ms, classified in ${formatMs(result.run_ms)} ms, ` +
      'once and without warm-up. The picture is what the network sees, rotated upright as its EXIF data say.');
  } catch (error) {
    find('prediction').hidden = true;
    const unread = error.name === 'InvalidStateError' || /decode/.test(error.message);
    setState(state, unread ? 'This file cannot be read as an image here: choose a JPEG or PNG.' : error.message, 'bad');
  }
}

async function startCamera() {
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: 'environment' } });
    find('video').srcObject = stream;
    await find('video').play();
    find('camera-view').hidden = false;
  } catch (error) {
    setState(find('classify-state'), `The camera cannot be used (${error.message}): choose a photo instead.`, 'bad');
  }
}

function stopCamera() {
  for (const track of find('video').srcObject?.getTracks() ?? []) track.stop();
  find('video').srcObject = null;
  find('camera-view').hidden = true;
}

async function takePhoto() {
  const video = find('video');
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext('2d').drawImage(video, 0, 0);
  stopCamera();
  await classify(await canvas.convertToBlob({ type: 'image/png' }));
}

function prepareClassify() {
  const able = [...manifest.programs.entries()].filter(([, program]) => program.weights);
  find('classify-none').hidden = able.length > 0;
  find('classify-tools').hidden = able.length === 0;
  find('classify-model').replaceChildren(...able.map(([i, program]) => new Option(
    program.label.includes(program.weights) ? program.label : `${program.label}, ${program.weights}`, i)));
  find('camera').hidden = !navigator.mediaDevices?.getUserMedia;
  find('photo').onchange = ({ target }) => target.files[0] && classify(target.files[0]);
  const classifySample = () => classify(fetch(manifest.images[0]).then((response) => response.blob()));
  find('sample').onclick = classifySample;
  find('camera').onclick = startCamera;
  find('camera-stop').onclick = stopCamera;
  find('shoot').onclick = takePhoto;
  if (able.length) classifySample();
}

// 3. Measure ----------------------------------------------------------------------------------------------------------

/** Load, check and warm up each row; those that fail say why and are not timed. */
async function prepareRows(report) {
  for (const row of rows) {
    const name = `${row.program.label}, ${row.backend.label}`;
    try {
      const { job, loaded, check } = await open(
        manifest, row.program, row.backend, (share) => report(`Loading ${name}: ${Math.round(100 * share)} %`));
      Object.assign(row, { job, loaded, check });
      if (stopped) throw new Error(stopped);
      row.isWrong = !check.isRight || !check.samePixels;
      if (row.isWrong) throw new Error(explainWrong(row.program, check));
      if (row.backend.isSoftware) {
        throw new Error('Right, but computed by a software stand-in for a GPU, whose times mean nothing: not timed.');
      }
      report(`Warming up ${name}`);
      row.warm = await job.call('warmUp');
    } catch (error) {
      row.failure = stopped || error.message;
      row.job?.end();
    }
    showRows();
    if (stopped) break;
  }
}

function shuffle(items) {
  const order = [...items];
  for (let i = order.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

/** Time all rows in rounds, each in random order, so that heat and other work meet them all. */
async function timeRounds(rules, report) {
  for (let round = 0; round < rules.rounds && !stopped; round++) {
    report(`Round ${round + 1} of ${rules.rounds}: leave the page in front`, round / rules.rounds);
    for (const row of shuffle(rows.filter(({ failure }) => !failure))) {
      const count = Math.max(rules.runs, Math.ceil((1000 * rules.seconds) / (row.warm.typical * row.warm.block)));
      try {
        row.rounds.push(await row.job.call('time', { count, block: row.warm.block }));
      } catch (error) {
        row.failure = stopped || error.message;
      }
    }
    await new Promise((resolve) => { setTimeout(resolve, rules.pause); });
  }
}

/** Check again after the last timed run: some GPUs are right at first only. */
async function finishRows() {
  for (const row of rows) {
    if (stopped) row.failure = stopped;
    if (!row.failure) {
      try {
        row.check = await row.job.call('check');
        row.isWrong = !row.check.isRight;
        if (row.isWrong) row.failure = `After the last run, ${explainWrong(row.program, row.check)}`;
        else row.summary = summarise(row.rounds);
      } catch (error) {
        row.failure = error.message;
      }
    }
    row.job?.end();
  }
}

function readRules() {
  const rules = { ...RULES };
  for (const name of ['rounds', 'runs', 'seconds', 'pause']) {
    const value = Number(query.get(name));
    if (query.has(name) && value >= 0) rules[name] = value;
  }
  const own = Object.entries(rules).filter(([name, value]) => value !== RULES[name]).map((pair) => pair.join(' '));
  return [rules, own.length ? `not the standard protocol: ${own.join(', ')}` : ''];
}

async function measure() {
  const chosen = (name) => [...document.querySelectorAll(`#${name} input:checked`)].map((box) => Number(box.value));
  const [rules, protocol] = readRules();
  const now = new Date();
  const date = [now.getFullYear(), now.getMonth() + 1, now.getDate()].map((n) => String(n).padStart(2, '0')).join('-');
  rows = chosen('models').flatMap((i) => chosen('backends').map((k) => (
    { program: manifest.programs[i], backend: backends[k], rounds: [], date, protocol })))
    .filter(({ program, backend }) => backend.runtime in program.files);
  const state = find('measure-state');
  if (!rows.length) {
    setState(state, 'Choose at least one network and what runs it; LiteRT runs fp32 only.', 'bad');
    return;
  }
  stopped = '';
  const bar = find('measure-progress');
  const report = (text, share = 0) => { setState(state, text); bar.value = share; };
  for (const id of ['start', 'stop']) find(id).hidden = id === 'start';
  bar.hidden = false;
  find('classify-tools').inert = true; // nothing else runs meanwhile
  await classifying;
  classifier?.job.end();
  classifier = undefined;
  const lock = await navigator.wakeLock?.request('screen').catch(() => undefined); // low battery refuses it
  await prepareRows(report);
  await timeRounds(rules, report);
  report('Checking the outputs again', 1);
  await finishRows();
  await lock?.release();
  find('classify-tools').inert = false;
  bar.hidden = true;
  for (const id of ['start', 'stop']) find(id).hidden = id === 'stop';
  const failed = rows.filter(({ failure }) => failure).length;
  setState(state, stopped || `Done: ${rows.length - failed} of ${rows.length} rows measured.`, stopped ? 'bad' : '');
  showRows();
}

function stop(reason) {
  if (find('stop').hidden || stopped) return;
  stopped = reason;
  for (const row of rows) row.job?.end(reason);
}

function showRows() {
  find('results').hidden = false;
  const titles = [...document.querySelectorAll('#results th[scope=col]')].map(({ textContent }) => textContent);
  find('rows').replaceChildren(...rows.filter((row) => row.summary || row.failure).map((row) => {
    const line = document.createElement('tr');
    line.append(...describeRow(row).map(({ text, kind }, i) => {
      const cell = document.createElement(i ? 'td' : 'th');
      if (!i) cell.scope = 'row';
      cell.textContent = text;
      cell.className = kind ?? '';
      cell.dataset.label = titles[i];
      return cell;
    }));
    return line;
  }));
  find('plot').replaceChildren(...drawPlot(rows, find('plot').clientWidth));
  showRowsToSend();
}

// Sending -------------------------------------------------------------------------------------------------------------

function showRowsToSend() {
  const sender = { browser: facts.Browser };
  for (const name of ['device', 'os', 'reporter', 'note']) sender[name] = find(name).value.trim();
  const lines = makeCSV(rows, manifest, sender);
  find('csv').value = lines.join('\n');
  const files = {
    'csv-file': [[manifest.columns.join(','), ...lines, ''].join('\n'), 'text/csv'],
    'json-file': [makeJSON(rows, manifest, sender, facts), 'application/json'],
  };
  for (const [id, [text, type]] of Object.entries(files)) {
    URL.revokeObjectURL(find(id).href);
    find(id).href = URL.createObjectURL(new Blob([text], { type }));
  }
  const missing = [
    !sender.device && 'the device', !/\d/.test(sender.os) && 'the system with its version',
    !sender.reporter && 'your name',
  ].filter(Boolean);
  setState(find('send-state'), missing.length ? `Fill in ${missing.join(', ')} before you send the rows.` : '');
}

function prepareSending() {
  for (const id of ['device', 'os', 'reporter', 'note']) find(id).oninput = showRowsToSend;
  find('copy').onclick = async () => {
    find('csv').select();
    await navigator.clipboard?.writeText(find('csv').value);
    setState(find('send-state'), navigator.clipboard ? 'Copied.' : 'Selected: copy it.');
  };
  find('share').hidden = !navigator.share;
  find('share').onclick = () => navigator.share({ text: find('csv').value }).catch(() => {}); // closed by the user
}

// This browser --------------------------------------------------------------------------------------------------------

function showFacts() {
  find('facts').replaceChildren(...Object.entries(facts).flatMap(([name, value]) => {
    const [term, text] = [document.createElement('dt'), document.createElement('dd')];
    term.textContent = name;
    text.textContent = value;
    return [term, text];
  }));
}

function addChoices(id, choices) {
  find(id).replaceChildren(...choices.map(({ text, hint, isChecked }, value) => {
    const label = document.createElement('label');
    const box = Object.assign(document.createElement('input'), { type: 'checkbox', value, checked: isChecked });
    const [name, remark] = [document.createElement('span'), document.createElement('span')];
    name.textContent = text;
    remark.textContent = hint;
    remark.className = 'hint';
    label.append(box, name, remark);
    return label;
  }));
}

/** What choosing this backend downloads beyond the self-check. */
function describeDownload({ runtime, provider, threads, isSoftware }) {
  if (provider === 'webgpu') {
    const file = `ort-wasm-simd-threaded.${'Suspending' in WebAssembly ? 'jspi' : 'asyncify'}.wasm`;
    return `${sizeRuntime(runtime, file)} more${isSoftware ? ', software: checked, not timed' : ''}`;
  }
  if (runtime !== 'litert') return '';
  const file = `litert_wasm_${threads > 1 ? 'threaded_' : ''}internal.wasm`;
  return `${sizeRuntime(runtime, file)} more, and programs of its own`;
}

function prepareMeasure() {
  const wanted = (name) => query.get(name)?.split(',');
  const [rules] = readRules();
  addChoices('models', manifest.programs.map((program, i) => ({
    text: program.label,
    hint: [
      megabytes(getBytes(program)), program.top1 && `top-1 ${program.top1} %`, program.weights ? '' : 'speed only',
    ].filter(Boolean).join(', '),
    isChecked: wanted('models')?.includes(program.model) ?? i < 3,
  })));
  addChoices('backends', backends.map((backend) => ({
    text: backend.label,
    hint: describeDownload(backend),
    isChecked: wanted('backends')?.includes(backend.name) ?? (backend.provider === 'wasm' && backend.threads === 1),
  })));
  find('protocol').textContent =
    'One image at a time, in 32-bit floating point unless the network says fp16. Each network runs in a worker of ' +
    'its own: its file is checked, then its outputs; 10 to 50 runs warm it up, until two medians of 5 agree within 5 %. ' +
    `Then come ${rules.rounds} rounds: in each, all networks take turns in random order, with ${rules.runs} runs or ` +
    `${rules.seconds} s each, whichever is longer, and ${rules.pause / 1000} s of rest after the round. A run lasts ` +
    'from the image as numbers to the outputs in memory; preparing the image is not part of it. Where the clock of ' +
    'the browser is too coarse, several runs are timed together. The table shows the median and the 10th and 90th ' +
    'percentile; the first run, which compiles or fills caches, is apart; load is the time to make the program ' +
    'ready, without the download. Outputs are checked again at the end, and a wrong network gets no time. If the last fifth ' +
    'of the rounds is more than 1.15 times as slow as the first, the device was hot or busy. Hiding the page voids ' +
    'the measurement.';
  find('start').onclick = measure;
  find('stop').onclick = () => stop('stopped');
  self.addEventListener('resize', () => find('plot').replaceChildren(...drawPlot(rows, find('plot').clientWidth)));
  document.addEventListener('visibilitychange', () => document.hidden && stop(LOST));
  find('start').disabled = false;
}

// Start ---------------------------------------------------------------------------------------------------------------

/** Use the service worker: offline, and isolated after one reload where the host sends no headers. */
async function startOffline() {
  if (!navigator.serviceWorker) return;
  try {
    await navigator.serviceWorker.register('sw.js');
    await navigator.serviceWorker.ready;
    const taken = new Promise((resolve) => {
      if (navigator.serviceWorker.controller) resolve();
      else navigator.serviceWorker.addEventListener('controllerchange', resolve, { once: true });
    });
    await Promise.race([taken, new Promise((resolve) => { setTimeout(resolve, PATIENCE); })]); // not after a forced reload
  } catch (error) {
    facts['Offline use'] = `no (${error.message})`;
    return;
  }
  facts['Offline use'] = 'yes, with the networks that were used once';
  if (!self.crossOriginIsolated && !sessionStorage.getItem('reloaded')) {
    sessionStorage.setItem('reloaded', 'yes');
    location.reload();
    await new Promise(() => {}); // until then
  }
}

/** Forget programs of earlier pages. */
async function cleanCache() {
  const files = manifest.programs.flatMap((program) => Object.values(program.files));
  const current = new Set(files.map(({ file }) => new URL(file, location.href).href));
  for (const name of self.caches ? await caches.keys() : []) {
    const cache = await caches.open(name);
    for (const { url } of await cache.keys()) if (/\/models\//.test(url) && !current.has(url)) await cache.delete(url);
  }
}

async function start() {
  await startOffline();
  const response = await fetch('manifest.json');
  if (!response.ok) throw new Error(`manifest.json: the server answers ${response.status}`);
  manifest = await response.json();
  for (const program of manifest.programs) program.label = nameProgram(program);
  await cleanCache();
  const { device, os, browser } = await describeBrowser();
  facts.Browser = browser;
  Object.assign(find('device'), { value: device });
  Object.assign(find('os'), { value: os });
  backends = await listBackends(facts, manifest);
  showFacts();
  const runtimes = Object.values(manifest.runtimes).map(({ name, licence }) => `${name} (${licence} licence)`);
  find('version').textContent = `caretrans ${manifest.version}, ${runtimes.join(', ')}. Bundled test ` +
    'images: Grocery Store Dataset, M. Klasson et al., MIT licence.';
  prepareSending();
  await checkFirst();
  prepareClassify();
  prepareMeasure();
  if (query.has('auto')) await measure();
}

start().catch((error) => setState(find('check'), `The page cannot start: ${error.message}`, 'bad'));
