// Offline use: the service worker, and the cache that it fills.

const PATIENCE = 5000; // ms for the service worker to be installed and to take the page over
export const CACHE = `caretrans-page ${new URL('./', self.location.href)}`; // as in sw.js

/** Resolves when the service worker controls the page; `report` is called once it is installed. */
async function takeOver(report) {
  const { serviceWorker } = navigator;
  await serviceWorker.register('sw.js');
  await serviceWorker.ready; // never, if it cannot be installed
  report();
  if (serviceWorker.controller) return;
  await new Promise((resolve) => { serviceWorker.addEventListener('controllerchange', resolve, { once: true }); });
}

/** Use the service worker: offline, and isolated after one reload where the host sends no headers. Says whether. */
export async function startOffline() {
  if (!navigator.serviceWorker) return 'no: not a secure context, or switched off';
  let isInstalled = false;
  try {
    await Promise.race([
      takeOver(() => { isInstalled = true; }), // never takes a page over after a forced reload
      new Promise((resolve) => { setTimeout(resolve, PATIENCE); })]);
  } catch (error) {
    return `no (${error.message})`;
  }
  if (!isInstalled) return 'no: the service worker could not be installed';
  if (!self.crossOriginIsolated && !sessionStorage.getItem('reloaded')) {
    sessionStorage.setItem('reloaded', 'yes');
    location.reload();
    await new Promise(() => {}); // until then
  }
  return 'yes, with what was loaded once, where there is room for it';
}

/** Forget programs of earlier pages in this folder. */
export async function cleanCache(programs) {
  if (!self.caches) return;
  const toURL = (file) => new URL(file, location.href).href;
  const current = new Set(programs.flatMap(({ files }) => Object.values(files)).map(({ file }) => toURL(file)));
  const cache = await caches.open(CACHE);
  for (const { url } of await cache.keys()) {
    if (url.startsWith(toURL('models/')) && !current.has(url)) await cache.delete(url);
  }
}
