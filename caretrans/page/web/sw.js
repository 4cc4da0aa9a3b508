// Offline use, and the headers that threads need where a host cannot send them. Files whose names hold a hash or a
// version never change and come from the cache; everything else comes from the network while there is one.
const CACHE = 'caretrans-page';
const FIXED = /\/(models|images|vendor)\//;
const CORE = [
  './', 'manifest.json', 'style.css', 'page.js', 'device.js', 'job.js', 'results.js', 'start_worker.js', 'worker.js',
  'runtimes.js', 'prepare.js'];
const HEADERS = {
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Embedder-Policy': 'require-corp',
  'Cross-Origin-Resource-Policy': 'same-origin',
};

function isolate(response) {
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}

/** From the network, handed on while it streams; kept where there is room. */
async function fetchAndKeep(cache, event) {
  const response = await fetch(event.request);
  if (response.status === 200) event.waitUntil(cache.put(event.request, response.clone()).catch(() => {}));
  return response;
}

async function answer(event) {
  const { request } = event;
  const cache = await caches.open(CACHE);
  const kept = await cache.match(request, { ignoreSearch: true });
  if (kept && FIXED.test(request.url)) return isolate(kept);
  try {
    return isolate(await fetchAndKeep(cache, event));
  } catch (error) {
    if (kept) return isolate(kept);
    throw error;
  }
}

/** Keep the page, the first runtime for the CPU and the test images; the rest is kept as it is used. */
async function install() {
  const cache = await caches.open(CACHE);
  const { images, runtimes } = await (await fetch('manifest.json')).json();
  const { files, folder } = runtimes.onnxruntime;
  const cpu = Object.keys(files).filter((name) => /^ort(\.wasm\.min|-wasm-simd-threaded)\.\w+$/.test(name));
  await cache.addAll([...CORE, ...images, ...cpu.map((name) => folder + name)]);
  await self.skipWaiting();
}

self.addEventListener('install', (event) => event.waitUntil(install()));
self.addEventListener('activate', (event) => event.waitUntil(self.clients.claim()));
self.addEventListener('fetch', (event) => {
  if (event.request.method === 'GET' && new URL(event.request.url).origin === self.location.origin) {
    event.respondWith(answer(event));
  }
});
