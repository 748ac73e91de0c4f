/**
 * The GPU: an adapter checked for what we need, its device, compiled pipelines, buffers under an
 * out-of-memory scope, and reads that do not sleep.
 *
 * @module
 */
import { FleetError } from "../shared/errors.ts";

/** What the adapter says of itself. */
export interface GpuInfo {
  name: string;
  /** A software rasterizer (llvmpipe and the like). */
  software: boolean;
}

/** How to open a GPU. */
export interface GpuOptions {
  /** Take a software adapter too; refused otherwise. */
  software: boolean;
  /** `"adapter"` asks for all that the adapter offers, `"default"` for WebGPU's guaranteed limits. */
  limits?: "adapter" | "default";
}

/** A compute shader with its constants. */
export interface PipelineOptions {
  label: string;
  code: string;
  entryPoint?: string;
  constants?: Record<string, number>;
  /**
   * The bindings of group 0, in order. Pipelines of the same bindings take the same bind groups
   * ({@linkcode Gpu.bindings}); left out, the layout is the pipeline's own.
   */
  bindings?: readonly BindingKind[];
}

/** What is bound: a uniform, storage that is read, storage that is read and written. */
export type BindingKind = "uniform" | "read" | "write";

const WANTED_LIMITS = [
  "maxStorageBufferBindingSize",
  "maxBufferSize",
  "maxComputeWorkgroupStorageSize",
  "maxComputeInvocationsPerWorkgroup",
  "maxComputeWorkgroupSizeX",
  "maxStorageBuffersPerShaderStage",
] as const;

/** Buffer sizes are multiples of this. */
export const BUFFER_ALIGN = 16;

/** `bytes` rounded up to what a buffer may be. */
export function alignBytes(bytes: number): number {
  return Math.max(BUFFER_ALIGN, Math.ceil(bytes / BUFFER_ALIGN) * BUFFER_ALIGN);
}

/** What an adapter is. */
export function gpuInfo({ info }: GPUAdapter): GpuInfo {
  const name = info.description || info.device || "unnamed adapter";
  const software = info.isFallbackAdapter || /llvmpipe|swiftshader|lavapipe/i.test(name);
  return { name, software };
}

/** An open GPU. Any uncaptured WebGPU error is fatal: see {@linkcode Gpu.failure}. */
export class Gpu {
  readonly device: GPUDevice;
  readonly info: GpuInfo;
  readonly limits: GPUSupportedLimits;
  /** Timestamp queries are there. */
  readonly timestamps: boolean;
  /** The first uncaptured error or the loss of the device; results after it are not to be trusted. */
  failure: FleetError | null = null;
  #pipelines = new Map<string, Promise<GPUComputePipeline>>();
  #layouts = new Map<string, GPUBindGroupLayout>();

  private constructor(device: GPUDevice, info: GpuInfo) {
    this.device = device;
    this.info = info;
    this.limits = device.limits;
    this.timestamps = device.features.has("timestamp-query");
    device.addEventListener("uncapturederror", (event) => {
      event.preventDefault?.();
      this.#fail((event as GPUUncapturedErrorEvent).error.message);
    });
    device.lost.then((lost) => {
      if (lost.reason !== "destroyed") this.#fail(`device lost: ${lost.message}`);
    });
  }

  /**
   * Opens the first adapter.
   *
   * @throws FleetError `gpu` when there is none, it is a software one and that was not asked for, or
   * it lacks `shader-f16`
   */
  static async open(options: GpuOptions): Promise<Gpu> {
    const adapter = await navigator.gpu?.requestAdapter({ powerPreference: "high-performance" });
    if (!adapter) {
      throw new FleetError(
        "gpu",
        "WebGPU finds no adapter; install the GPU's Vulkan driver and loader (Debian: libvulkan1), " +
          "or mesa-vulkan-drivers and --software to run on the CPU",
      );
    }
    const { name, software } = gpuInfo(adapter);
    if (software && !options.software) {
      throw new FleetError(
        "gpu",
        `The only adapter, ${name}, is a software one; install the GPU's Vulkan driver, ` +
          "or pass --software to run on the CPU",
      );
    }
    if (!adapter.features.has("shader-f16")) {
      throw new FleetError("gpu", `${name} has no shader-f16, which every kernel needs`);
    }
    const requiredFeatures: GPUFeatureName[] = ["shader-f16"];
    if (adapter.features.has("timestamp-query")) requiredFeatures.push("timestamp-query");
    const requiredLimits: Record<string, number> = {};
    if (options.limits !== "default") {
      for (const limit of WANTED_LIMITS) requiredLimits[limit] = adapter.limits[limit];
    }
    const device = await adapter.requestDevice({ requiredFeatures, requiredLimits });
    return new Gpu(device, { name, software });
  }

  /** @throws FleetError `gpu` when anything has gone wrong on the device since it was opened */
  check(): void {
    if (this.failure) throw this.failure;
  }

  /**
   * A compute pipeline, compiled once per code, constants and bindings.
   *
   * @throws FleetError `gpu` that shows the offending WGSL line
   */
  pipeline(options: PipelineOptions): Promise<GPUComputePipeline> {
    const entryPoint = options.entryPoint ?? "main";
    const key = JSON.stringify([
      options.code,
      entryPoint,
      options.constants ?? {},
      options.bindings,
    ]);
    let pipeline = this.#pipelines.get(key);
    if (!pipeline) {
      pipeline = this.#compile(options, entryPoint);
      this.#pipelines.set(key, pipeline);
    }
    return pipeline;
  }

  /** The bind group layout that all pipelines of these `bindings` share. */
  bindings(bindings: readonly BindingKind[]): GPUBindGroupLayout {
    const key = bindings.join();
    let layout = this.#layouts.get(key);
    if (!layout) {
      const type = { uniform: "uniform", read: "read-only-storage", write: "storage" } as const;
      layout = this.device.createBindGroupLayout({
        label: key,
        entries: bindings.map((kind, binding) => ({
          binding,
          visibility: GPUShaderStage.COMPUTE,
          buffer: { type: type[kind] },
        })),
      });
      this.#layouts.set(key, layout);
    }
    return layout;
  }

  async #compile(options: PipelineOptions, entryPoint: string): Promise<GPUComputePipeline> {
    const { device } = this;
    device.pushErrorScope("validation");
    const module = device.createShaderModule({ label: options.label, code: options.code });
    const pipeline = device.createComputePipeline({
      label: options.label,
      layout: options.bindings
        ? device.createPipelineLayout({ bindGroupLayouts: [this.bindings(options.bindings)] })
        : "auto",
      compute: { module, entryPoint, constants: options.constants },
    });
    const error = await device.popErrorScope();
    if (error) {
      const info = await module.getCompilationInfo?.();
      const lines = options.code.split("\n");
      const at = (info?.messages ?? [])
        .filter((message) => message.type === "error" && message.lineNum > 0)
        .map((message) => `\n  line ${message.lineNum}: ${lines[message.lineNum - 1]?.trim()}`)
        .join("");
      throw new FleetError(
        "gpu",
        `Kernel ${options.label} does not compile: ${error.message}${at}`,
      );
    }
    return pipeline;
  }

  /** A zeroed buffer of at least `bytes`. For scratch of known size; weights go through {@linkcode allocate}. */
  buffer(label: string, bytes: number, usage: GPUBufferUsageFlags): GPUBuffer {
    return this.device.createBuffer({ label, size: alignBytes(bytes), usage });
  }

  /** A storage buffer that can be written, copied from and copied to. */
  storage(label: string, bytes: number): GPUBuffer {
    return this.buffer(
      label,
      bytes,
      GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_DST | GPUBufferUsage.COPY_SRC,
    );
  }

  /** A storage buffer that holds `data`. */
  upload(label: string, data: ArrayBufferView<ArrayBuffer>): GPUBuffer {
    const buffer = this.storage(label, data.byteLength);
    this.write(buffer, 0, data);
    return buffer;
  }

  /** Writes `data` at `offset` (a multiple of 4); a tail that is no multiple of 4 bytes is padded with zeros. */
  write(buffer: GPUBuffer, offset: number, data: ArrayBufferView<ArrayBuffer>): void {
    const whole = data.byteLength & ~3;
    if (whole > 0) {
      this.device.queue.writeBuffer(buffer, offset, data.buffer, data.byteOffset, whole);
    }
    if (whole < data.byteLength) {
      const tail = new Uint8Array(4);
      tail.set(new Uint8Array(data.buffer, data.byteOffset + whole, data.byteLength - whole));
      this.device.queue.writeBuffer(buffer, offset + whole, tail);
    }
  }

  /**
   * Runs `allocate` under an out-of-memory scope.
   *
   * @param what for the message: "the weights of layers 0 to 39"
   * @throws FleetError `out-of-memory`
   */
  async allocate<T>(what: string, allocate: () => T | Promise<T>): Promise<T> {
    this.device.pushErrorScope("out-of-memory");
    let made: T;
    try {
      made = await allocate();
    } finally {
      const error = await this.device.popErrorScope();
      if (error) {
        // deno-lint-ignore no-unsafe-finally
        throw new FleetError(
          "out-of-memory",
          `${this.info.name} has no memory for ${what}: ${error.message}`,
        );
      }
    }
    return made;
  }

  /** Reads `bytes` of a buffer the ordinary way; for tests and load, not for steps. */
  async read(buffer: GPUBuffer, bytes: number, offset = 0): Promise<ArrayBuffer> {
    const staging = this.buffer("read", bytes, GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST);
    const encoder = this.device.createCommandEncoder();
    encoder.copyBufferToBuffer(buffer, offset, staging, 0, Math.ceil(bytes / 4) * 4);
    this.device.queue.submit([encoder.finish()]);
    await staging.mapAsync(GPUMapMode.READ);
    const copy = staging.getMappedRange().slice(0, bytes);
    staging.unmap();
    staging.destroy();
    this.check();
    return copy;
  }

  /** Ends the device; idempotent. */
  close(): void {
    this.device.destroy();
  }

  #fail(message: string): void {
    this.failure ??= new FleetError("gpu", `${this.info.name}: ${message}`);
  }
}
