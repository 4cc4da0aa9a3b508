// Starts page.js, and says so where one of its scripts is missing.
import('./page.js').catch((error) => {
  const state = document.getElementById('check');
  state.textContent = `The page cannot start: ${error.message}`;
  state.classList.add('bad');
});
