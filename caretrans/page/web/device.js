// What the browser says about itself and its device, and what can run programs in it.

const AGENTS = { // names by what user agents say; the first that is found, as most also say Chrome or Version
  EdgA: 'Edge', EdgiOS: 'Edge', Edg: 'Edge', SamsungBrowser: 'Samsung Internet', OPR: 'Opera', CriOS: 'Chrome',
  FxiOS: 'Firefox', Firefox: 'Firefox', Chrome: 'Chrome', Version: 'Safari',
};
const MOST_THREADS = 4; // more are rarely faster for single images, and phones have few fast cores

/** Name and version of a browser by its user agent, for browsers that do not tell them otherwise. */
export function nameBrowser(agent) {
  for (const [word, name] of Object.entries(AGENTS)) {
    const [, version] = agent.match(new RegExp(`${word}/([\\d.]+)`)) ?? [];
    if (version) return `${name} ${version}`;
  }
  return agent;
}

/** Names of device, system and browser, as far as they are told. Only Chromium tells the model of a phone. */
export async function describeBrowser() {
  const wanted = ['model', 'platformVersion', 'fullVersionList'];
  const data = await navigator.userAgentData?.getHighEntropyValues(wanted).catch(() => undefined);
  const brands = data?.fullVersionList?.filter(({ brand: name }) => !/not.?a.?brand/i.test(name));
  const brand = brands?.find(({ brand: name }) => name !== 'Chromium') ?? brands?.[0];
  const agent = navigator.userAgent;
  const ios = agent.match(/(?:iPhone|CPU) OS (\d+)_(\d+)/);
  return {
    device: data?.model || (agent.match(/iPhone|iPad/) ?? [''])[0],
    os: data?.platform ? nameSystem(data) : ios ? `iOS ${ios[1]}.${ios[2]}` : '',
    browser: brand ? `${brand.brand} ${brand.version}` : nameBrowser(agent),
  };
}

/** Windows counts its platform versions otherwise: 13 and later are Windows 11. */
function nameSystem({ platform, platformVersion }) {
  if (platform !== 'Windows') return `${platform} ${platformVersion}`.trim();
  return parseInt(platformVersion, 10) >= 13 ? 'Windows 11' : 'Windows 10';
}

/** What can run programs here; adds to the facts that are shown. */
export async function listBackends(facts, { runtimes }) {
  const cores = navigator.hardwareConcurrency || 1;
  const threads = Math.min(MOST_THREADS, cores);
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  Object.assign(facts, {
    'CPU cores': `${cores}, as the browser says`,
    Threads: !self.crossOriginIsolated ? 'one: the page is not isolated, see docs/browser.md' : `up to ${threads}`,
    'Secure context': self.isSecureContext ? 'yes' : 'no: no camera, no WebGPU, no offline use, files are not hashed',
  });
  const counts = self.crossOriginIsolated && threads > 1 ? [1, threads] : [1];
  const several = Object.keys(runtimes).length > 1;
  const label = (runtime, text) => (several ? `${runtimes[runtime].name.split(' ')[0]}, ${text}` : text);
  const list = Object.keys(runtimes).flatMap((runtime) => counts.map((count) => ({
    name: (runtime === 'litert' ? 'litert-' : '') + (count > 1 ? 'threads' : 'wasm'),
    runtime, provider: 'wasm', threads: count, label: label(runtime, `CPU, ${count} thread${count > 1 ? 's' : ''}`),
  })));
  if (adapter) {
    const { vendor, architecture, isFallbackAdapter } = adapter.info ?? {}; // older browsers have none
    const isSoftware = Boolean(isFallbackAdapter) || /swiftshader|llvmpipe/.test(architecture);
    facts.WebGPU = [vendor, architecture, isSoftware ? 'software only' : '',
      adapter.features.has('shader-f16') ? 'float16' : 'no float16'].filter(Boolean).join(', ');
    const runtime = 'onnxruntime';
    list.push({ name: 'webgpu', runtime, provider: 'webgpu', label: label(runtime, 'GPU, by WebGPU'), isSoftware });
  } else {
    facts.WebGPU = 'not offered';
  }
  return list;
}
