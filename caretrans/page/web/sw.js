// Offline use, and the headers that threads need where a host cannot send them. Files whose names hold a hash or a
// version never change and come from the cache; everything else comes from the network while there is one.
const CACHE = `caretrans-page ${self.registration.scope}`; // as in offline.js; the host may have other pages
const FIXED = ['models/', 'images/', 'vendor/'].map((folder) => self.registration.scope + folder);
const CORE = [
  './', 'manifest.json', 'style.css', 'page.js', 'classify.js', 'device.js', 'dom.js', 'job.js', 'offline.js',
  'results.js', 'start.js', 'start_worker.js', 'worker.js', 'runtimes.js', 'prepare.js'];
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
  if (kept && FIXED.some((start) => request.url.startsWith(start))) return isolate(kept);
  try {
    return isolate(await fetchAndKeep(cache, event));
  } catch (error) {
    if (kept) return isolate(kept);
    throw error;
  }
}

/** Keep the page and the test images; the rest is kept as it is used, the first runtime by the check on opening. */
async function install() {
  const cache = await caches.open(CACHE);
  const { images } = await (await fetch('manifest.json')).json();
  await cache.addAll([...CORE, ...images]);
  await self.skipWaiting();
}

self.addEventListener('install', (event) => event.waitUntil(install()));
self.addEventListener('activate', (event) => event.waitUntil(self.clients.claim()));
self.addEventListener('fetch', (event) => {
  if (event.request.method === 'GET' && new URL(event.request.url).origin === self.location.origin) {
    event.respondWith(answer(event));
  }
});
