// The runtimes: each compiles a program, to a function from an image as numbers to its logits on the CPU.

const hasJSPI = 'Suspending' in WebAssembly;

/** The file of WebAssembly that a backend runs; LiteRT.js has another for browsers without relaxed SIMD. */
export function nameWasm({ runtime, provider, threads }, hasRelaxedSimd = true) {
  if (runtime === 'litert') {
    return `litert_wasm_${!hasRelaxedSimd ? 'compat_' : threads > 1 ? 'threaded_' : ''}internal.wasm`;
  }
  return `ort-wasm-simd-threaded${provider !== 'webgpu' ? '' : hasJSPI ? '.jspi' : '.asyncify'}.wasm`;
}

/** What comes of a request; browsers only say that it failed. */
export async function reach(name, request) {
  try {
    return await request;
  } catch {
    throw new Error(
      `${name} is not stored in this browser yet, and the server does not send it: connect, and load it once.`);
  }
}

async function checkWebGPU(precision) {
  const adapter = await navigator.gpu?.requestAdapter();
  if (!adapter) throw new Error('This browser offers no WebGPU here.');
  if (precision === 'fp16' && !adapter.features.has('shader-f16')) {
    throw new Error('This GPU does not compute in float16 (shader-f16): choose the fp32 file.');
  }
}

/** ONNX Runtime Web, on the CPU or by WebGPU. */
async function prepareONNX(folder, program, backend) {
  const { provider, threads = 1 } = backend;
  const isGPU = provider === 'webgpu';
  if (isGPU) await checkWebGPU(program.precision);
  const script = `ort.${!isGPU ? 'wasm' : hasJSPI ? 'jspi' : 'webgpu'}.min.mjs`;
  const ort = await reach(script, import(folder + script));
  ort.env.wasm.wasmPaths = folder;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = 'error';
  const compile = async (content, binary) => {
    ort.env.wasm.wasmBinary = binary;
    const [height, width] = program.size;
    const session = await ort.InferenceSession.create(content, {
      executionProviders: [provider], freeDimensionOverrides: { batch: 1, height, width },
    });
    return async (image) => {
      const input = new ort.Tensor('float32', image, [1, 3, height, width]);
      const output = (await session.run({ [session.inputNames[0]]: input }))[session.outputNames[0]];
      const logits = Float32Array.from(await output.getData());
      output.dispose();
      return logits;
    };
  };
  return { wasm: nameWasm(backend), compile };
}

/** LiteRT.js on the CPU. Its scripts look for their files beside the worker unless told otherwise. */
async function prepareLiteRT(folder, program, backend) {
  const { threads } = backend;
  const litert = await reach('LiteRT.js', import(`${folder}index.js`));
  const wasm = nameWasm(backend, await litert.supportsFeature('relaxedSimd'));
  const compile = async (content, wasmBinary) => {
    self.Module = {
      locateFile: (name) => folder + name, mainScriptUrlOrBlob: folder + wasm.replace('.wasm', '.js'), wasmBinary,
    };
    await litert.loadLiteRt(folder, { threads: threads > 1 });
    const model = await litert.loadAndCompile(content, { accelerator: 'wasm', cpuOptions: { numThreads: threads } });
    return async (image) => {
      const input = new litert.Tensor(image, [1, 3, ...program.size]);
      const [output] = await model.run([input]);
      const logits = Float32Array.from(output.toTypedArray());
      input.delete();
      output.delete();
      return logits;
    };
  };
  return { wasm, compile };
}

const PREPARE = { onnxruntime: prepareONNX, litert: prepareLiteRT };

/** Load a runtime's scripts: the name of its WebAssembly, and what compiles a program from the bytes of both files. */
export async function prepareRuntime(folder, program, backend) {
  const base = new URL(folder, self.location.href).href;
  const { wasm, compile } = await PREPARE[backend.runtime](base, program, backend);
  const script = wasm.replace('.wasm', backend.runtime === 'litert' ? '.js' : '.mjs'); // into the cache, untimed
  await reach(script, fetch(base + script).then((response) => response.arrayBuffer()));
  return { wasm, compile };
}
