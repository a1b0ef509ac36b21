// Light or dark: as the system has it, until the button is pressed.
const DARK = matchMedia("(prefers-color-scheme: dark)");

export function makeTheme(button, changed) {
  let chosen = null;
  const show = () => {
    const theme = chosen ?? (DARK.matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
    changed(theme);
  };
  const toggle = () => {
    chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    show();
  };
  button.addEventListener("click", toggle);
  DARK.addEventListener("change", show);
  show();
  return toggle;
}
