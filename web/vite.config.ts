import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vitest/config";

// The page is served from the package itself, so it is built into it; the folder is ignored by git.
export default defineConfig({
  plugins: [svelte()],
  build: {
    outDir: "../src/vitrail/app/static",
    emptyOutDir: true,
    target: "es2022",
    // light-dark() as the browsers have it, without a stand-in.
    cssTarget: ["chrome123", "firefox120", "safari17.5"],
    // The server's content security policy allows no inline data for scripts, and small files need no inlining here.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
  },
  test: { include: ["tests/**/*.test.ts"], environment: "node" },
  server: { proxy: Object.fromEntries(["/api", "/thumb", "/photo"].map((path) => [path, "http://127.0.0.1:8765"])) },
});
