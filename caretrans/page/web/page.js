// The page: checks a network on opening, classifies photos, and measures networks in rounds.
import { endClassifier, endClassifying, prepareClassify } from './classify.js';
import { describeBrowser, listBackends } from './device.js';
import { describeProgress, find, getBytes, megabytes, setState } from './dom.js';
import { describeError, explainWrong, Job } from './job.js';
import { cleanCache, startOffline } from './offline.js';
import { BACKENDS, describeRow, drawPlot, makeCSV, makeJSON, summarise } from './results.js';
import { nameWasm } from './runtimes.js';

const RULES = { rounds: 10, runs: 5, seconds: 0.5, pause: 500 }; // of a measurement; per round, ms between rounds
const MOST_ON_GPU = 450; // runs of a worker on WebGPU: some browsers on iOS crash after about 500
const LOST = 'the page was hidden or left during the measurement, so its times are void: measure again';
const sizeWasm = (backend) => megabytes(manifest.runtimes[backend.runtime].files[nameWasm(backend)].bytes);
const query = new URLSearchParams(location.search);

let manifest;
let backends;
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

// 1. Check ------------------------------------------------------------------------------------------------------------

async function checkFirst() {
  const single = manifest.programs.filter(({ precision }) => precision === 'fp32');
  const [program] = (single.length ? single : [...manifest.programs]).sort((a, b) => getBytes(a) - getBytes(b));
  const bar = find('check-progress');
  const state = find('check');
  setState(state, `Loading the smallest network, ${program.model}, ${megabytes(getBytes(program))}, ` +
    `and the runtime, ${sizeWasm(backends[0])}…`);
  const start = performance.now();
  try {
    const job = new Job();
    const { loaded, check } = await job.open(
      manifest, program, backends[0], ({ count, total }) => { bar.value = count / total; });
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

// 3. Measure ----------------------------------------------------------------------------------------------------------

/** Load, check and warm up each row; those that fail say why and are not timed. */
async function prepareRows(report) {
  for (const row of rows.filter(({ failure }) => !failure)) {
    if (stopped) break;
    const name = `${row.program.label}, ${row.backend.label}`;
    row.job = new Job();
    try {
      Object.assign(row, await row.job.open(
        manifest, row.program, row.backend, (progress) => report(`Loading ${name}: ${describeProgress(progress)}`)));
      row.isWrong = !row.check.isRight || !row.check.samePixels;
      if (row.isWrong) throw new Error(explainWrong(row.program, row.check));
      if (row.backend.isSoftware) {
        throw new Error('Right, but computed by a software stand-in for a GPU, whose times mean nothing: not timed.');
      }
      report(`Warming up ${name}`);
      row.warm = await row.job.call('warmUp');
    } catch (error) {
      row.failure = stopped || error.message;
      row.job.end();
    }
    showRows();
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

/** How many times of a row a round takes. */
export function countTimes({ backend, warm }, rules) {
  const count = Math.max(rules.runs, Math.ceil((1000 * rules.seconds) / (warm.typical * warm.block)));
  const most = Math.floor((MOST_ON_GPU - warm.warm_up) / (rules.rounds * warm.block));
  return backend.provider === 'webgpu' ? Math.min(count, most) : count;
}

/** Time all rows in rounds, each in random order, so that heat and other work meet them all. */
async function timeRounds(rules, report) {
  const isActive = () => !stopped && rows.some(({ failure }) => !failure);
  for (let round = 0; round < rules.rounds && isActive(); round++) {
    report(`Round ${round + 1} of ${rules.rounds}: leave the page in front`, round / rules.rounds);
    for (const row of shuffle(rows.filter(({ failure }) => !failure))) {
      try {
        row.rounds.push(await row.job.call('time', { count: countTimes(row, rules), block: row.warm.block }));
      } catch (error) {
        row.failure = stopped || error.message;
      }
    }
    await new Promise((resolve) => { setTimeout(resolve, rules.pause); });
  }
}

/** Check again after the last timed run: some GPUs are right at first only. */
async function finishRow(row) {
  row.check = await row.job.call('check');
  row.isWrong = !row.check.isRight;
  if (row.isWrong) throw new Error(`After the last run, ${explainWrong(row.program, row.check)}`);
  const summary = summarise(row.rounds);
  if (!(summary.p10 > 0 && summary.drift > 0)) throw new Error('No time: no run was timed, or the clock stood still.');
  row.summary = summary;
}

async function finishRows() {
  for (const row of rows) {
    if (stopped) row.failure = stopped;
    if (!row.failure) await finishRow(row).catch((error) => { row.failure = error.message; });
    row.job?.end();
  }
}

/** The rules of a measurement, what sets them apart, and what is wrong with the address. */
function readQuery() {
  const rules = { ...RULES };
  const problems = [];
  for (const name of Object.keys(RULES).filter((name) => query.has(name))) {
    rules[name] = Number(query.get(name) || NaN);
    const isCount = name === 'rounds' || name === 'runs';
    const isRight = isCount ? Number.isInteger(rules[name]) && rules[name] >= 1 : rules[name] >= 0 && rules[name] < 1e6;
    const wanted = isCount ? 'a whole number of at least 1' : 'a number of at least 0';
    if (!isRight) problems.push(`${name}=${query.get(name)} in the address must be ${wanted}.`);
  }
  for (const [name, known] of [['models', manifest.programs.map(({ model }) => model)], ['backends', BACKENDS]]) {
    const unknown = (query.get(name)?.split(',') ?? []).filter((item) => !known.includes(item));
    const names = [...new Set(known)].join(', ');
    if (unknown.length) problems.push(`${name}=${unknown} in the address: choose from ${names}.`);
  }
  const own = Object.entries(rules).filter(([name, value]) => value !== RULES[name]).map((pair) => pair.join(' '));
  return { rules, protocol: own.length ? `not the standard protocol: ${own.join(', ')}` : '', problems };
}

/** A row for each network and what runs it, as chosen. */
function makeRows() {
  const chosen = (name) => [...document.querySelectorAll(`#${name} input:checked`)].map((box) => Number(box.value));
  const { rules, protocol } = readQuery();
  const now = new Date();
  const date = [now.getFullYear(), now.getMonth() + 1, now.getDate()].map((n) => String(n).padStart(2, '0')).join('-');
  return chosen('models').flatMap((i) => chosen('backends').map((k) => {
    const [program, backend] = [manifest.programs[i], backends[k]];
    const failure = backend.runtime in program.files ? undefined : 'skipped: LiteRT.js runs fp32 only';
    return { program, backend, rounds: [], date, rules, protocol, failure };
  }));
}

/** Show a button in place of another, and let it have the focus. */
function swapButtons(shown, hidden) {
  const isFocused = document.activeElement === find(hidden);
  find(shown).hidden = false;
  if (isFocused) find(shown).focus();
  find(hidden).hidden = true;
}

async function measure() {
  const state = find('measure-state');
  rows = makeRows();
  if (!rows.length) {
    setState(state, 'Choose at least one network and at least one way to run it that this browser offers.', 'bad');
    return;
  }
  stopped = '';
  const bar = find('measure-progress');
  const report = (text, share = 0) => { setState(state, text); bar.value = share; };
  if (document.hidden) {
    report('Waiting until the page is in front');
    await new Promise((resolve) => { document.addEventListener('visibilitychange', resolve, { once: true }); });
  }
  swapButtons('stop', 'start');
  bar.hidden = false;
  find('classify-tools').inert = true; // nothing else runs meanwhile
  await endClassifying();
  const lock = await navigator.wakeLock?.request('screen').catch(() => undefined); // low battery refuses it
  await prepareRows(report);
  await timeRounds(rows[0].rules, report);
  report('Checking the outputs again', 1);
  await finishRows();
  await lock?.release();
  find('classify-tools').inert = false;
  bar.hidden = true;
  swapButtons('start', 'stop');
  const measured = rows.filter(({ summary }) => summary).length;
  setState(state, stopped || `Done: ${measured} of ${rows.length} rows measured.`, stopped ? 'bad' : '');
  showRows();
}

function stop(reason) {
  if (find('stop').hidden || stopped) return;
  stopped = reason;
  endClassifier();
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
    const isCopied = await navigator.clipboard?.writeText(find('csv').value).then(() => true, () => false);
    setState(find('send-state'), isCopied ? 'Copied.' : 'The rows are selected: copy them.');
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
function describeDownload(backend) {
  if (backend.provider === 'webgpu') {
    return `${sizeWasm(backend)} more${backend.isSoftware ? ', software: checked, not timed' : ''}`;
  }
  return backend.runtime === 'litert' ? `${sizeWasm(backend)} more, and its own file of each network` : '';
}

function describeSizes({ files }) {
  const litert = files.litert ? `, for LiteRT.js ${megabytes(files.litert.bytes)}` : '';
  return `${megabytes(files.onnxruntime.bytes)}${litert}`;
}

function prepareMeasure() {
  const wanted = (name) => query.get(name)?.split(',');
  const { rules, problems } = readQuery();
  addChoices('models', manifest.programs.map((program, i) => ({
    text: program.label,
    hint: [
      describeSizes(program), program.top1 && `top-1 ${program.top1} %`, program.weights ? '' : 'speed only',
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
    'its own: its file is checked, then its outputs; 10 to 50 runs warm it up, until two medians of 5 agree within ' +
    `5 % or a step of the clock. Then come ${rules.rounds} rounds: in each, all networks take turns in random order, ` +
    `with ${rules.runs} runs or ${rules.seconds} s each, whichever is longer, and ${rules.pause / 1000} s of rest ` +
    `after the round. WebGPU runs each network at most ${MOST_ON_GPU} times. A run lasts from the image as numbers ` +
    'to the outputs in memory; preparing the image is not part of it. Where the clock of the browser is too coarse, ' +
    'several runs are timed together. The table shows the median and the 10th and 90th percentile; the first run, ' +
    'which compiles or fills caches, is apart; load is the time to make the runtime and the network ready, without ' +
    'the download. Outputs are checked again at the end, and a wrong network gets no time. If the last fifth of the ' +
    'rounds is more than 1.15 times as slow as the first, the device was hot or busy. Hiding the page voids the ' +
    'measurement.';
  find('start').onclick = measure;
  find('stop').onclick = () => stop('stopped');
  self.addEventListener('resize', () => find('plot').replaceChildren(...drawPlot(rows, find('plot').clientWidth)));
  document.addEventListener('visibilitychange', () => document.hidden && stop(LOST));
  find('start').disabled = problems.length > 0;
  setState(find('measure-state'), problems.join(' '), 'bad');
}

// Start ---------------------------------------------------------------------------------------------------------------

async function start() {
  facts['Offline use'] = await startOffline();
  const response = await fetch('manifest.json');
  if (!response.ok) throw new Error(`manifest.json: the server answers ${response.status}`);
  manifest = await response.json();
  for (const program of manifest.programs) program.label = nameProgram(program);
  await cleanCache(manifest.programs).catch(() => {}); // some browsers refuse caches, as in private windows
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
  prepareClassify(manifest, backends[0]);
  prepareMeasure();
  if (query.has('auto') && !find('start').disabled) await measure();
}

start().catch((error) => setState(find('check'), `The page cannot start: ${error.message}`, 'bad'));
